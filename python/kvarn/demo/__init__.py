"""The demonstration: a small trained model solves generated problems through KVarN caches, side by side with the 16-bit cache."""
