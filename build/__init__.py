"""The office: trains, exports, quantises, compiles, evaluates and packs a bundle. Needs torch."""
