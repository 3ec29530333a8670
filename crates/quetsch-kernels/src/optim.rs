//! AdamW (Loshchilov & Hutter 2019), one pass over a tensor.

/// The numbers of one step that all elements share.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub rate: f32,
    /// Decoupled weight decay.
    pub decay: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// 1 - beta1^step.
    pub correction1: f32,
    /// 1 - beta2^step.
    pub correction2: f32,
    /// What gradients are multiplied by first (clipping, accumulation).
    pub scale: f32,
}

kernel! {
    /// w -= rate * decay * w; w -= rate * m_hat / (sqrt(v_hat) + eps).
    pub fn adamw(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], p: AdamW) {
        let (step, root) = (p.rate / p.correction1, 1.0 / p.correction2.sqrt());
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * p.scale;
            *m = p.beta1 * *m + (1.0 - p.beta1) * g;
            *v = p.beta2 * *v + (1.0 - p.beta2) * (g * g);
            *w = *w * (1.0 - p.rate * p.decay) - step * (*m / (v.sqrt() * root + p.eps));
        }
    }
}
