//! Trade-offs: which points nothing beats, how much a set of them is worth, and which few stand for many.
//!
//! Costs are better when small, the gain when large. The hypervolume (Zitzler and Thiele 1998) of a set is the area
//! that its points dominate, up to a reference point that is worse than all of interest.

/// Which of (costs, gain) no other beats: no cost higher, no less gain, and better in one of them.
pub fn front<const N: usize>(points: &[([f64; N], f64)]) -> Vec<bool> {
    let beats = |a: &([f64; N], f64), b: &([f64; N], f64)| {
        let no_worse = a.0.iter().zip(&b.0).all(|(x, y)| x <= y) && a.1 >= b.1;
        no_worse && (a.0 != b.0 || a.1 > b.1)
    };
    points.iter().map(|p| !points.iter().any(|q| beats(q, p))).collect()
}

/// The area between the staircase of (cost, gain) and the reference: a cost and a gain that count nothing.
pub fn hypervolume(points: &[(f64, f64)], reference: (f64, f64)) -> f64 {
    let counts = |p: &&(f64, f64)| p.0 < reference.0 && p.1 > reference.1;
    let mut inside: Vec<(f64, f64)> = points.iter().filter(counts).copied().collect();
    inside.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let (mut area, mut height) = (0.0, reference.1);
    // From the cheapest on: each adds what it has above all cheaper ones.
    for (cost, gain) in inside {
        if gain > height {
            area += (reference.0 - cost) * (gain - height);
            height = gain;
        }
    }
    area
}

/// Up to `n` of the points, by index: one after the other the point that adds most hypervolume, which comes within
/// 1 - 1/e of the best such set (Nemhauser et al. 1978). Points that add nothing come last, the highest gain first.
pub fn select(points: &[(f64, f64)], n: usize, reference: (f64, f64)) -> Vec<usize> {
    let mut chosen: Vec<usize> = vec![];
    let mut left: Vec<usize> = (0..points.len()).collect();
    while chosen.len() < n && !left.is_empty() {
        let with = |i: usize| {
            let set: Vec<_> = chosen.iter().chain([&i]).map(|&i| points[i]).collect();
            hypervolume(&set, reference)
        };
        let better = |a: usize, b: usize| with(a).total_cmp(&with(b)).then(points[a].1.total_cmp(&points[b].1));
        let Some(at) = (0..left.len()).reduce(|best, i| if better(left[i], left[best]).is_gt() { i } else { best })
        else {
            break;
        };
        chosen.push(left.remove(at));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use quetsch::rng::Rng;

    #[test]
    fn the_front_is_what_nothing_beats() {
        let points = [(7.0, 0.93), (3.0, 0.925), (2.0, 0.929), (0.5, 0.929), (11.0, 0.9295)];
        let points = points.map(|(cost, gain)| ([cost], gain));
        assert_eq!(front(&points), [true, false, false, true, false]);
        assert_eq!(front(&[([1.0], 1.0), ([1.0], 1.0)]), [true, true], "equals do not beat each other");
        let two = [([1.0, 2.0], 0.9), ([2.0, 1.0], 0.9), ([2.0, 2.0], 0.9), ([2.0, 2.0], 0.91)];
        assert_eq!(front(&two), [true, true, false, true], "every cost counts");
    }

    #[test]
    fn a_staircase_has_the_area_of_its_steps() {
        let reference = (4.0, 0.0);
        for (points, area) in [
            (&[][..], 0.0),
            (&[(1.0, 2.0)], 6.0),
            (&[(1.0, 1.0), (3.0, 3.0)], 3.0 + 2.0),
            (&[(3.0, 3.0), (1.0, 1.0), (3.5, 2.0), (1.0, 0.5)], 5.0),
            (&[(5.0, 9.0), (1.0, -1.0), (f64::NAN, 1.0), (1.0, f64::NAN)], 0.0),
        ] {
            assert_eq!(hypervolume(points, reference), area, "{points:?}");
        }
    }

    /// The area is also the share of random points of a box that some point dominates.
    #[test]
    fn the_area_is_what_random_points_find() {
        let mut rng = Rng::new(7);
        let points: Vec<(f64, f64)> = (0..9).map(|_| (rng.uniform(), rng.uniform())).collect();
        let n = 200_000;
        let hits = (0..n).filter(|_| {
            let (x, y) = (rng.uniform(), rng.uniform());
            points.iter().any(|p| p.0 <= x && p.1 >= y)
        });
        let found = hits.count() as f64 / f64::from(n);
        let area = hypervolume(&points, (1.0, 0.0));
        assert!((area - found).abs() < 0.005, "{area} {found}");
    }

    #[test]
    fn few_points_stand_for_many() {
        let points = [(1.0, 1.0), (1.1, 1.05), (3.0, 3.0), (3.0, 2.0), (3.9, 3.1)];
        // Alone, the second has 2.9 x 1.05, more than the 3 of the first and the third.
        assert_eq!(select(&points, 2, (4.0, 0.0)), [1, 2]);
        let all = select(&points, 9, (4.0, 0.0));
        assert_eq!(all.len(), 5);
        assert_eq!(all[4], 3, "what adds nothing comes last: {all:?}");
        assert!(select(&[], 3, (4.0, 0.0)).is_empty());
    }
}
