"""How processes behave: how they end, what notices that one hangs, which warnings are expected."""
