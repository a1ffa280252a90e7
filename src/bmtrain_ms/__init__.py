from . import compat
compat.install()
from .comm import *
from .zero import *
