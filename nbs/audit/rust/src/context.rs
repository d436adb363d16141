//! The hot paths of the original. Where each of their arrays comes from is left open.
//!
//! S rows (tokens), D features: x, g are (S, D), the context c is (D, D).

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayRef1, ArrayRef2, Axis, Zip};

const MAX_ROWS: usize = 32; // of a batch, for its statistic
const NORM_FLOOR: f32 = 1e-12; // products of norms below it count as no correlation

/// How a product comes by the array for its result.
#[derive(Clone, Copy, PartialEq)]
pub enum Form {
    Dot,   // makes a new one
    Zeros, // multiplies into new zeros
    Kept,  // multiplies into that of the last call
}

/// An array that a path needs: six results of products, and the parts of an update's sample.
#[derive(Clone, Copy)]
pub enum Slot {
    Apply,
    Mixed,
    Corr,
    Cov,
    Denom,
    Step,
    X,
    Y,
    NormX,
    NormY,
}

const SLOTS: usize = Slot::NormY as usize + 1;

/// The form of each slot.
pub type Plan = fn(Slot) -> Form;

/// Before the change: every product is a `dot`.
pub fn before(_: Slot) -> Form {
    Form::Dot
}

/// After it, as shipped: two buffers are prepared and kept, three results are new zeros.
pub fn shipped(slot: Slot) -> Form {
    match slot {
        Slot::Cov | Slot::Denom => Form::Kept,
        _ => Form::Zeros,
    }
}

/// As it was meant: all arrays stay for the next call.
pub fn kept(_: Slot) -> Form {
    Form::Kept
}

/// Hands out arrays, and keeps those that the plan keeps.
pub struct Memory {
    plan: Plan,
    kept: [Option<Array2<f32>>; SLOTS],
}

impl Memory {
    pub fn new(plan: Plan) -> Self {
        Memory {
            plan,
            kept: [const { None }; SLOTS],
        }
    }

    /// The array that was given back last time, or else new zeros.
    fn array(&mut self, slot: Slot, shape: (usize, usize)) -> Array2<f32> {
        match self.kept[slot as usize].take() {
            Some(array) if array.dim() == shape => array,
            _ => Array2::zeros(shape),
        }
    }

    /// The matrix product of `a` and `b`, in the form that the plan has for its slot.
    pub fn product(&mut self, slot: Slot, a: &ArrayRef2<f32>, b: &ArrayRef2<f32>) -> Array2<f32> {
        if (self.plan)(slot) == Form::Dot {
            return a.dot(b);
        }
        let mut out = self.array(slot, (a.nrows(), b.ncols()));
        general_mat_mul(1.0, a, b, 0.0, &mut out);
        out
    }

    /// The array is no longer needed: keep it, or free it.
    pub fn give_back(&mut self, slot: Slot, array: Array2<f32>) {
        if (self.plan)(slot) == Form::Kept {
            self.kept[slot as usize] = Some(array);
        }
    }
}

/// Apply the context: x + (s / D) x c.
pub fn forward(memory: &mut Memory, x: &ArrayRef2<f32>, c: &ArrayRef2<f32>, s: f32) -> Array2<f32> {
    let scale = s / c.nrows() as f32;
    let mut out = memory.product(Slot::Apply, x, c);
    out.zip_mut_with(x, |mixed, &x| *mixed = scale * *mixed + x);
    out
}

/// Gradients of `forward` with respect to x and s, from g, the gradient of its output.
pub fn backward(
    memory: &mut Memory,
    x: &ArrayRef2<f32>,
    c: &ArrayRef2<f32>,
    s: f32,
    g: &ArrayRef2<f32>,
) -> (Array2<f32>, f32) {
    let dim = c.nrows() as f32;
    let mixed = memory.product(Slot::Mixed, x, c);
    let grad_s = Zip::from(g)
        .and(&mixed)
        .fold(0.0, |sum, g, mixed| sum + g * mixed)
        / dim;
    let mut grad_x = memory.product(Slot::Corr, g, &c.t());
    grad_x.zip_mut_with(g, |corr, &g| *corr = s / dim * *corr + g);
    memory.give_back(Slot::Mixed, mixed);
    (grad_x, grad_s)
}

/// Blend the statistic of a batch into c: tanh of the correlations between columns of x and y.
pub fn update(
    memory: &mut Memory,
    x: &ArrayRef2<f32>,
    y: &ArrayRef2<f32>,
    c: &mut ArrayRef2<f32>,
    rate: f32,
) {
    let (rows, dim) = (x.nrows().min(MAX_ROWS), x.ncols());
    let (mut sample_x, mut norm_x) = (
        memory.array(Slot::X, (rows, dim)),
        memory.array(Slot::NormX, (dim, 1)),
    );
    let (mut sample_y, mut norm_y) = (
        memory.array(Slot::Y, (rows, dim)),
        memory.array(Slot::NormY, (1, dim)),
    );
    sample(x, &mut sample_x, &mut norm_x.column_mut(0));
    sample(y, &mut sample_y, &mut norm_y.row_mut(0));

    let cov = memory.product(Slot::Cov, &sample_x.t(), &sample_y);
    let denom = memory.product(Slot::Denom, &norm_x, &norm_y);
    Zip::from(c)
        .and(&cov)
        .and(&denom)
        .for_each(|c, &cov, &denom| *c = blended(*c, cov, denom, rate));

    memory.give_back(Slot::X, sample_x);
    memory.give_back(Slot::Y, sample_y);
    memory.give_back(Slot::NormX, norm_x);
    memory.give_back(Slot::NormY, norm_y);
    memory.give_back(Slot::Cov, cov);
    memory.give_back(Slot::Denom, denom);
}

/// Rows of `from`, spread over all of it, with the mean of each column taken out; and their norms.
fn sample(from: &ArrayRef2<f32>, rows: &mut ArrayRef2<f32>, norm: &mut ArrayRef1<f32>) {
    let count = rows.nrows();
    for (i, mut row) in rows.rows_mut().into_iter().enumerate() {
        let source = from.row(i * from.nrows() / count);
        row.zip_mut_with(&source, |to, &v| *to = if v.is_finite() { v } else { 0.0 });
    }
    norm.fill(0.0); // the sum of each column first, then that of its squares
    for row in rows.rows() {
        norm.zip_mut_with(&row, |sum, &value| *sum += value);
    }
    for mut row in rows.axis_iter_mut(Axis(0)) {
        row.zip_mut_with(norm, |value, &sum| *value -= sum / count as f32);
    }
    norm.fill(0.0);
    for row in rows.rows() {
        norm.zip_mut_with(&row, |sum, &value| *sum += value * value);
    }
    norm.mapv_inplace(f32::sqrt);
}

fn blended(c: f32, cov: f32, denom: f32, rate: f32) -> f32 {
    let similarity = if denom > NORM_FLOOR {
        (cov / denom).tanh()
    } else {
        0.0
    };
    (1.0 - rate) * c + rate * similarity
}
