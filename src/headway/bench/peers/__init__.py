"""Headway beside the engines that a user could pick instead, on the same processor."""
