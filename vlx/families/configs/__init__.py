"""What the methods of a family let their users set. Importable without torch."""
