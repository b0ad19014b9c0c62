"""Limits of the quantized dtypes, for references and kernel generators alike."""

# Largest value of each type; fp8 is e4m3 without infinities.
QUANTIZED_MAX = {"int8": 127.0, "float8_e4m3fn": 448.0}
# Rows whose largest value is below this quantize to zeros instead of dividing by (almost) nothing.
SMALLEST_ABSMAX = 1e-10
