"""From a job to a frozen plan: options, checks, quantization, cuts, memory. Opens headers only and writes nothing."""
