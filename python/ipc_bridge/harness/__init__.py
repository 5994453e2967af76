"""What runs the programs of this project rather than being part of them: the demo, and the overhead
of a pair over its bare program. It knows the peers by their command line only, never by import.
"""
