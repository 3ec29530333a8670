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

/// What a step without a gradient needs: [`adamw`] with g = 0.
#[derive(Clone, Copy, Debug)]
pub struct Idle {
    /// Decoupled weight decay's factor, 1 - rate * decay.
    pub shrink: f32,
    /// rate / correction1
    pub step: f32,
    /// 1 / sqrt(correction2)
    pub root: f32,
}

kernel! {
    /// Several steps of [`adamw`] with gradient 0, in order: the same operations, hence the same bits.
    pub fn adamw_idle(w: &mut [f32], m: &mut [f32], v: &mut [f32], steps: &[Idle], beta1: f32, beta2: f32, eps: f32) {
        let one = |w: &mut f32, m: &mut f32, v: &mut f32, s: &Idle| {
            *m *= beta1;
            *v *= beta2;
            *w = *w * s.shrink - s.step * (*m / (v.sqrt() * s.root + eps));
        };
        let ((w, w_rest), (m, m_rest), (v, v_rest)) =
            (w.as_chunks_mut::<16>(), m.as_chunks_mut::<16>(), v.as_chunks_mut::<16>());
        for ((w, m), v) in w.iter_mut().zip(m).zip(v) {
            for s in steps {
                for i in 0..16 {
                    one(&mut w[i], &mut m[i], &mut v[i], s);
                }
            }
        }
        for ((w, m), v) in w_rest.iter_mut().zip(m_rest).zip(v_rest) {
            steps.iter().for_each(|s| one(w, m, v, s));
        }
    }
}
