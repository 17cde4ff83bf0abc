"""What the three steps share, one folder per step."""

__path__.append(f"{__path__[0]}/renamed")  # former names of programs
