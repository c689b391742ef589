"""Families of models as data: tensor names and roles, attention, routing, and the halves of a layer. Needs no torch."""
