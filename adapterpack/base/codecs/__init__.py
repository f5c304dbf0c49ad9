"""How weights are stored: as plain numbers, or in the formats of quantized checkpoints, read and written without their libraries."""
