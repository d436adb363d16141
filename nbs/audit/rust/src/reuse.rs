//! A buffer whose shape changes from call to call: three ways to follow it.

use ndarray::{Array2, ArrayViewMut2};

use crate::allocations::{whole, Allocated};
use crate::cases::Size;

/// A buffer that hands out an array of a shape.
pub trait Buffer {
    fn take(&mut self, shape: Size) -> ArrayViewMut2<'_, f32>;
}

/// As in the original: a number is rounded up to a power of two, and the array has the exact
/// shape all the same.
#[derive(Default)]
pub struct ExactShape {
    rounded: usize,
    array: Array2<f32>,
}

impl Buffer for ExactShape {
    fn take(&mut self, shape: Size) -> ArrayViewMut2<'_, f32> {
        self.rounded = shape.0.max(shape.1).next_power_of_two();
        if self.array.dim() != shape {
            self.array = Array2::zeros(shape);
        }
        self.array.view_mut()
    }
}

/// Room for the largest shape so far; a smaller one is a view of its beginning.
#[derive(Default)]
pub struct Capacity {
    room: Vec<f32>,
}

/// The same, and the room grows to powers of two.
#[derive(Default)]
pub struct RoundedCapacity {
    room: Vec<f32>,
}

/// A view of the first numbers of `room`, which grows to `wanted` where it is too small.
fn view(room: &mut Vec<f32>, shape: Size, wanted: usize) -> ArrayViewMut2<'_, f32> {
    let needed = shape.0 * shape.1;
    if room.len() < needed {
        *room = Vec::new(); // nothing in it has to be copied
        *room = vec![0.0; wanted];
    }
    ArrayViewMut2::from_shape(shape, &mut room[..needed]).expect("as many numbers as the shape has")
}

impl Buffer for Capacity {
    fn take(&mut self, shape: Size) -> ArrayViewMut2<'_, f32> {
        view(&mut self.room, shape, shape.0 * shape.1)
    }
}

impl Buffer for RoundedCapacity {
    fn take(&mut self, shape: Size) -> ArrayViewMut2<'_, f32> {
        view(
            &mut self.room,
            shape,
            (shape.0 * shape.1).next_power_of_two(),
        )
    }
}

/// What a new buffer allocates along a stream of shapes.
pub fn replay(mut buffer: impl Buffer, shapes: &[Size]) -> Allocated {
    whole(|| {
        for &shape in shapes {
            let mut array = buffer.take(shape);
            assert_eq!(array.dim(), shape);
            array[[shape.0 - 1, shape.1 - 1]] = 1.0;
        }
    })
}
