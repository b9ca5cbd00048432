"""The linear maps that weights stand for: their symbols, products and explicit matrices."""
