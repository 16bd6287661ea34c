"""Parts of a decode step as machine code for the CPU, compiled by numba: what torch does in many small operations, or not at all.

A kernel is a function of one address, that of a block of 64-bit integers (sizes and addresses), and runs once in each thread of a team.
All numbers in memory are bfloat16, all arithmetic is float32; each row's result depends on that row alone, whatever stands beside it.
"""
