"""Analysis that needs no training: collecting states, vector arithmetic, erasure, probing and checkpoint audits."""
