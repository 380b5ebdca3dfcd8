"""Files to arrays, and maps back to files. Knows no model."""
