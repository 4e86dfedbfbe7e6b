"""Commands that look in from outside: evaluation, benchmark, PLC simulator, demonstration, the built-in teacher."""
