"""A stand-in for torchvision, of which the reference script needs six picture transforms and nothing else.

The package on PyPI for GPUs cannot be imported beside a CPU build of torch. What is here is PIL and numpy code that
gives the same pixels; it is only put on the path of the process that runs the script.
"""

__version__ = "0.0.0"
