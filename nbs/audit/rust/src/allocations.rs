//! A global allocator that counts, and tells packing buffers from everything else.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::json::Json;

/// Arrays of `f32` and Rust's collections ask for 8 bytes of alignment at most. The matrix
/// multiply asks for 16 or more, so that its vectors can be loaded whole.
const WIDEST_OF_ARRAYS: usize = 8;

static ARRAYS: Tally = Tally::new();
static PACKING: Tally = Tally::new();
static ALL: Tally = Tally::new();
static TALLIES: [&Tally; 3] = [&ARRAYS, &PACKING, &ALL];

/// What one kind of memory was asked for.
struct Tally {
    allocations: AtomicUsize,
    bytes: AtomicUsize,
    live: AtomicUsize,
    peak: AtomicUsize,
}

impl Tally {
    const fn new() -> Self {
        Tally {
            allocations: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            live: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    fn take(&self, size: usize) {
        self.allocations.fetch_add(1, Relaxed);
        self.bytes.fetch_add(size, Relaxed);
        let live = self.live.fetch_add(size, Relaxed) + size;
        self.peak.fetch_max(live, Relaxed);
    }

    fn free(&self, size: usize) {
        self.live.fetch_sub(size, Relaxed);
    }

    fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    /// Count from here on; what is live stays live.
    fn restart(&self) {
        self.allocations.store(0, Relaxed);
        self.bytes.store(0, Relaxed);
        self.peak.store(self.live(), Relaxed);
    }

    /// What was counted since the restart, with what is held beyond `base`.
    fn since(&self, base: usize) -> Counted {
        Counted {
            allocations: self.allocations.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            peak: self.peak.load(Relaxed) - base,
            kept: self.live() - base,
        }
    }
}

fn kind(layout: Layout) -> &'static Tally {
    if layout.align() > WIDEST_OF_ARRAYS {
        &PACKING
    } else {
        &ARRAYS
    }
}

/// The system's allocator, with its books kept.
pub struct Counting;

// `realloc` is the trait's own: it allocates, copies and frees, and is counted as that.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        kind(layout).take(layout.size());
        ALL.take(layout.size());
        System.alloc(layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        kind(layout).take(layout.size());
        ALL.take(layout.size());
        System.alloc_zeroed(layout)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        kind(layout).free(layout.size());
        ALL.free(layout.size());
        System.dealloc(pointer, layout)
    }
}

/// Memory of one kind: what a call asks for, and with what earlier calls keep, its peak.
#[derive(Clone, Copy)]
pub struct Counted {
    pub allocations: usize,
    pub bytes: usize,
    pub peak: usize,
    pub kept: usize,
}

/// Memory of one call, in bytes.
#[derive(Clone, Copy)]
pub struct Allocated {
    pub arrays: Counted,
    pub packing: Counted,
    pub peak: usize,
}

/// Count all of a call, with nothing before it.
pub fn whole(call: impl FnOnce()) -> Allocated {
    let base = TALLIES.map(Tally::live);
    counted(base, call)
}

/// Count the second of two calls: the first one may prepare what it keeps.
pub fn steady(mut call: impl FnMut()) -> Allocated {
    let base = TALLIES.map(Tally::live);
    call();
    counted(base, call)
}

fn counted(base: [usize; 3], call: impl FnOnce()) -> Allocated {
    TALLIES.into_iter().for_each(Tally::restart);
    call();
    Allocated {
        arrays: ARRAYS.since(base[0]),
        packing: PACKING.since(base[1]),
        peak: ALL.since(base[2]).peak,
    }
}

impl From<Counted> for Json {
    fn from(counted: Counted) -> Json {
        Json::object([
            ("count", counted.allocations),
            ("nbytes", counted.bytes),
            ("peak", counted.peak),
            ("kept", counted.kept),
        ])
    }
}

impl From<Allocated> for Json {
    fn from(allocated: Allocated) -> Json {
        Json::object([
            ("arrays", Json::from(allocated.arrays)),
            ("packing", Json::from(allocated.packing)),
            ("peak", Json::from(allocated.peak)),
        ])
    }
}
