"""MoBiQuant: calibration of one nested 2-to-8-bit file per language model (arXiv 2602.20191).

Importing this package never imports torch; the calibration modules do.
"""

__version__ = "0.1.0"
