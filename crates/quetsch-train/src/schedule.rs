//! Learning-rate schedules, tied to the total number of steps.

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// Linear to 0, as `get_linear_schedule_with_warmup` in transformers.
    #[default]
    Linear,
    /// Half a cosine to 0, as `get_cosine_schedule_with_warmup`.
    Cosine,
    /// No decay.
    Constant,
}

impl Schedule {
    /// Factor of the learning rate at `step` (from 0) of `steps`, the first `warmup` of which rise linearly from 0.
    pub fn factor(self, step: usize, steps: usize, warmup: usize) -> f32 {
        if step < warmup {
            return step as f32 / warmup as f32;
        }
        let progress = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
        match self {
            Schedule::Linear => (1.0 - progress).max(0.0) as f32,
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())) as f32,
            Schedule::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_transformers() {
        let rows = [
            (Schedule::Linear, 0, 10, 2, 0.0),
            (Schedule::Linear, 1, 10, 2, 0.5),
            (Schedule::Linear, 2, 10, 2, 1.0),
            (Schedule::Linear, 6, 10, 2, 0.5),
            (Schedule::Linear, 10, 10, 2, 0.0),
            (Schedule::Cosine, 6, 10, 2, 0.5),
            (Schedule::Cosine, 4, 10, 2, 0.853_553_4),
            (Schedule::Constant, 9, 10, 2, 1.0),
            (Schedule::Linear, 0, 1, 0, 1.0),
        ];
        for (s, step, steps, warmup, want) in rows {
            let got = s.factor(step, steps, warmup);
            assert!((got - want).abs() < 1e-6, "{s:?} {step}/{steps}: {got} != {want}");
        }
    }
}
