"""Where the hosts' code comes from: installed, or GR00T's from the checkout that LARA_GR00T_SRC names."""

import os

from benchmarks.checkout import add_checkout

checkout = os.environ.get("LARA_GR00T_SRC")
if checkout:
    root = add_checkout(checkout, "NVIDIA Isaac GR00T", contains="gr00t/__init__.py")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))  # subprocesses
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
