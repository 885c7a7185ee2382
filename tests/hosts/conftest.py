"""Where the hosts' code comes from: installed, or GR00T's from the checkout that LARA_GR00T_SRC names."""

import os
import sys

# ranks.py: functions on two gloo ranks

checkout = os.environ.get("LARA_GR00T_SRC")
if checkout:
    if not os.path.isfile(os.path.join(checkout, "gr00t", "__init__.py")):
        raise RuntimeError(f"LARA_GR00T_SRC={checkout!r} has no gr00t/__init__.py")
    sys.path.insert(0, checkout)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))  # subprocesses
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
