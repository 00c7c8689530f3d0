"""Files, processes and machines: what every part uses and what knows none of them."""
