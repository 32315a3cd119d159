"""What was trained on top of a base model: scales, biases, heads, and what they were trained on."""
