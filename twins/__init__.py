"""Twins-SVT and Twins-PCPVT with EcoFormer attention and its peers."""
