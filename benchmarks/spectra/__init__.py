"""How fast is κ, and how right? A profile against PEFT's selector, a full SVD, and the bare factorization."""
