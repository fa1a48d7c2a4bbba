"""The Expected Free Energy loss with hard-cell masking."""
