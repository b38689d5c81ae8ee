"""calibrate: the largest magnitudes of what each linear takes and gives, measured by running the source's own model on some tokens.

The model is transformers', one decoder layer at a time, so that one layer's weights are in memory. Nothing here is on the path of a
conversion: it is the only stage beside verification's forward pass that knows torch.
"""
