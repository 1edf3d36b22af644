"""Files in: lines parsed and checked. Files out: outcomes rendered."""
