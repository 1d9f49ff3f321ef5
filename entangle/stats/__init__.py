"""Pure mathematics on tensors: distances, moments, sketches, intervals."""
