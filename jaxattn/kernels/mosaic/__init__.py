"""Kernels through Pallas's Mosaic GPU lowering: Hopper's bulk copies, warpgroup products and warp specialisation."""
