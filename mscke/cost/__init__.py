"""What every part costs: parameters, bytes, FLOPs, seconds; at our sizes and at the paper's."""
