"""A folder as a user has it: networks of their own in a package, one of them with a mistake in it."""

from __future__ import annotations

from pathlib import Path

NETS = '''
import torch
from torch import nn

from my_pkg.layers import Flat


class Probabilities(nn.Module):
    """Ends in a softmax, as models that were made for serving do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).softmax(dim=1)


def flat(width=32, classes=62, pixels=1024):
    return nn.Sequential(Flat(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, classes))


def serving(width=32, classes=62, pixels=1024):
    return Probabilities(flat(width, classes, pixels))


def no_module():
    return [1, 2, 3]


def two_answers():
    class Two(nn.Module):
        def forward(self, x):
            return x, x
    return Two()


def fails():
    raise RuntimeError("no such layer")


CONSTANT = 7
'''
LAYERS = """
from torch import nn


class Flat(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)  # needs rows that lie in plain order
"""


def write_package(folder: Path) -> Path:
    """``my_pkg`` with ``nets`` and ``layers``, and a module that does not import."""
    package = folder / "my_pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(NETS)
    (package / "layers.py").write_text(LAYERS)
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")
    (folder / "aside.py").write_text("VALUE = 1\n")
    return folder
