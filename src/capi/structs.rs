//! Structs that cross the boundary. They only ever grow at their end, so an older caller passes a shorter one and a
//! newer caller a longer one; both work.

use std::mem::{MaybeUninit, size_of};

use super::boundary::null;
use crate::error::{Error, Result};

/// Longest struct that a caller may claim: a wild size is refused before memory behind the struct is touched.
const SIZE_MAX_BYTES: usize = 65536;

/// A struct of the ABI.
///
/// # Safety
/// `#[repr(C)]`, plain data without padding that matters, valid when all bytes are zero.
pub(super) unsafe trait AbiStruct: Copy {
    /// Size in its first release: no caller can have a shorter one.
    const FIRST_SIZE: usize;
}

fn bad_size(name: &'static str, size: usize, first: usize) -> Error {
    Error::ArgumentValue {
        name,
        value: size.to_string(),
        expected: if size < first {
            "sizeof the struct, as compiled from qcow2.h (it is too small)"
        } else {
            "sizeof the struct, as compiled from qcow2.h (it is absurdly large)"
        },
    }
}

/// Fills a struct of the caller: the tail that this version does not know is zeroed, a missing tail is left out.
///
/// # Safety
/// `out` is NULL or valid for writes of `out_size` bytes.
pub(super) unsafe fn fill<T: AbiStruct>(name: &'static str, out: *mut T, out_size: usize, value: &T) -> Result<()> {
    if out.is_null() {
        return Err(null(name));
    }
    if out_size < T::FIRST_SIZE || out_size > SIZE_MAX_BYTES {
        return Err(bad_size("out_size", out_size, T::FIRST_SIZE));
    }
    let known = out_size.min(size_of::<T>());
    // SAFETY: `out` has out_size >= known bytes by the caller's promise, and `value` has size_of::<T>() >= known.
    unsafe {
        std::ptr::write_bytes(out.cast::<u8>(), 0, out_size);
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), out.cast::<u8>(), known);
    }
    Ok(())
}

/// Reads a struct of the caller whose first member is `size_t struct_size`: a missing tail is zero, and a tail that
/// this version does not know must be.
///
/// # Safety
/// `given` is NULL or points to a struct that is as long as its first member says.
pub(super) unsafe fn read<T: AbiStruct>(name: &'static str, given: *const T) -> Result<T> {
    if given.is_null() {
        return Err(null(name));
    }
    let bytes = given.cast::<u8>();
    // SAFETY: not NULL, and every such struct begins with its size.
    let size = unsafe { given.cast::<usize>().read_unaligned() };
    if size < T::FIRST_SIZE || size > SIZE_MAX_BYTES {
        return Err(bad_size("struct_size", size, T::FIRST_SIZE));
    }
    for at in size_of::<T>()..size {
        // SAFETY: at < size, which the struct is long.
        if unsafe { *bytes.add(at) } != 0 {
            return Err(Error::ArgumentValue {
                name,
                value: format!("a struct of {size} bytes with byte {at} set"),
                expected: "zeroes in the members that this version of the library does not know",
            });
        }
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: copies at most size_of::<T>() bytes out of `size`; all-zero is a valid T, and so is what the caller
    // filled in (plain data).
    unsafe {
        std::ptr::copy_nonoverlapping(bytes, value.as_mut_ptr().cast::<u8>(), size.min(size_of::<T>()));
        Ok(value.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Default, Debug, PartialEq)]
    struct Grown {
        struct_size: usize,
        first: u64,
        second: u64,
    }
    // SAFETY: repr(C), three integers of 8 bytes.
    unsafe impl AbiStruct for Grown {
        const FIRST_SIZE: usize = 16;
    }

    #[test]
    fn older_and_newer_callers_are_served() {
        let value = Grown { struct_size: 24, first: 7, second: 9 };
        let mut memory = [u64::MAX; 5];
        // SAFETY: 16 of 40 bytes.
        unsafe { fill("out", memory.as_mut_ptr().cast::<Grown>(), 16, &value) }.unwrap();
        assert_eq!(
            memory,
            [24, 7, u64::MAX, u64::MAX, u64::MAX],
            "an older caller's memory behind its struct is left alone"
        );
        // SAFETY: 32 of 40 bytes.
        unsafe { fill("out", memory.as_mut_ptr().cast::<Grown>(), 32, &value) }.unwrap();
        assert_eq!(memory, [24, 7, 9, 0, u64::MAX], "a newer caller's tail is zeroed");

        let older = [16u64, 5, 77];
        // SAFETY: 16 bytes are claimed of 24.
        let read_back = unsafe { read("in", older.as_ptr().cast::<Grown>()) }.unwrap();
        assert_eq!(read_back, Grown { struct_size: 16, first: 5, second: 0 });
        let newer = [32u64, 5, 6, 0];
        // SAFETY: 32 bytes are claimed of 32.
        assert_eq!(unsafe { read("in", newer.as_ptr().cast::<Grown>()) }.unwrap().second, 6);
    }

    #[test]
    fn sizes_and_tails_that_cannot_be_right_are_refused() {
        for size in [0u64, 8, 15, 65537, u64::MAX] {
            let given = [size, 0, 0];
            // SAFETY: only the size is looked at.
            let error = unsafe { read("in", given.as_ptr().cast::<Grown>()) }.unwrap_err();
            assert!(error.to_string().contains(&size.to_string()), "{error}");
        }
        let newer = [32u64, 5, 6, 0x100];
        // SAFETY: 32 bytes are claimed of 32.
        let error = unsafe { read("in", newer.as_ptr().cast::<Grown>()) }.unwrap_err();
        assert!(error.to_string().contains("byte 25"), "{error}");
    }
}
