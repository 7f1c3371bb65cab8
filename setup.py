# The native kernels' build comes here with the kernels; everything else stands in pyproject.toml.
from setuptools import setup

setup()
