//! The formulas as loops, in double precision, and the checks against them.

use ndarray::Array2;

use crate::cases::{Case, Inputs, Size, PATHS, PLANS, RATE, STRENGTH};

/// What a path must give: an array, and a number that `backward` alone has.
fn expected(path: &str, inputs: &Inputs) -> (Array2<f64>, f64) {
    let [x, y, g, c] = [&inputs.x, &inputs.y, &inputs.g, &inputs.c].map(|a| a.mapv(f64::from));
    let ((rows, dim), s) = (x.dim(), f64::from(STRENGTH));
    let scale = s / dim as f64;
    let mixed = |t: usize, j: usize| (0..dim).map(|i| x[[t, i]] * c[[i, j]]).sum::<f64>();
    let corr = |t: usize, i: usize| (0..dim).map(|j| g[[t, j]] * c[[i, j]]).sum::<f64>();
    match path {
        "forward" => (
            Array2::from_shape_fn((rows, dim), |(t, j)| x[[t, j]] + scale * mixed(t, j)),
            0.0,
        ),
        "backward" => {
            let all = (0..rows).flat_map(|t| (0..dim).map(move |j| (t, j)));
            let grad_s = all.map(|(t, j)| g[[t, j]] * mixed(t, j)).sum::<f64>() / dim as f64;
            let grad_x = |(t, i)| g[[t, i]] + scale * corr(t, i);
            (Array2::from_shape_fn((rows, dim), grad_x), grad_s)
        }
        _ => {
            let rate = f64::from(RATE);
            let taken: Vec<usize> = (0..rows.min(32)).map(|i| i * rows / rows.min(32)).collect();
            let blend = |(i, j)| {
                let similarity = correlation(&taken, |t| x[[t, i]], |t| y[[t, j]]).tanh();
                (1.0 - rate) * c[[i, j]] + rate * similarity
            };
            (Array2::from_shape_fn((dim, dim), blend), 0.0)
        }
    }
}

/// Pearson's, of two columns at some rows.
fn correlation(rows: &[usize], a: impl Fn(usize) -> f64, b: impl Fn(usize) -> f64) -> f64 {
    let mean =
        |f: &dyn Fn(usize) -> f64| rows.iter().map(|&t| f(t)).sum::<f64>() / rows.len() as f64;
    let (mean_a, mean_b) = (mean(&a), mean(&b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for &t in rows {
        let (da, db) = (a(t) - mean_a, b(t) - mean_b);
        ab += da * db;
        aa += da * da;
        bb += db * db;
    }
    ab / (aa * bb).sqrt()
}

/// Panic unless every plan gives the reference's result, at a small size.
pub fn check_formulas() {
    for size in [(40, 24), (7, 5)] {
        let inputs = Inputs::new(size, 0);
        for path in PATHS {
            let (array, number) = expected(path, &inputs);
            for (name, plan) in PLANS {
                Case::new(path, plan, inputs.clone()).call_and(|found, beside| {
                    let pairs = found.iter().zip(&array).map(|(&f, &e)| (f64::from(f), e));
                    let off = pairs.map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
                    assert!(off < 1e-5, "{path}, {name}, {size:?}: off by {off}");
                    let off = (f64::from(beside) - number).abs();
                    assert!(
                        off < 1e-4,
                        "{path}, {name}, {size:?}: the number is off by {off}"
                    );
                });
            }
        }
    }
}

/// Panic unless every plan gives the same bits as the one before it, in each of three calls.
pub fn check_plans(size: Size) {
    for path in PATHS {
        let mut cases = PLANS.map(|(_, plan)| Case::new(path, plan, Inputs::new(size, 0)));
        for _ in 0..3 {
            let [first, others @ ..] = &mut cases;
            let wanted = first.call_and(|array, number| (array.clone(), number));
            for case in others {
                let same = case.call_and(|array, number| (array, number) == (&wanted.0, wanted.1));
                assert!(same, "{path}, {size:?}: the plans differ");
            }
        }
    }
}
