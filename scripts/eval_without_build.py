"""Runs kvarn.eval.campaign from the source tree, where the compiled core need not be: the package's own __init__ is left out."""

import sys
import types
from pathlib import Path

package = types.ModuleType("kvarn")
package.__path__ = [str(Path(__file__).resolve().parents[1] / "python" / "kvarn")]
sys.modules["kvarn"] = package

from kvarn.eval.campaign import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
