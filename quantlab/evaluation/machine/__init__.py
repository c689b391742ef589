"""The machine a number was measured on: its name, its clock and memory, its energy meter, and who else was using it."""
