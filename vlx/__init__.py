"""vlx: run, compare and extend published vision and vision-language methods."""

__version__ = "0.1.0"
