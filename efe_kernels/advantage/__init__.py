"""Rewards and advantages for reinforcement learning."""
