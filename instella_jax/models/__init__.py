"""Networks: pure functions of parameters and inputs, unaware of losses."""
