//! The C functions in any order that the manual allows: live handles or NULL, any numbers, sizes and flags, strings that
//! are no UTF-8, structs of other versions. Nothing may panic, hang, touch memory that was not given to it, or call what
//! the caller has taken away; and in the end everything that was handed over has been given back, once.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use libc::{iovec, ssize_t};
use qcow2::capi::bitmap::*;
use qcow2::capi::check::*;
use qcow2::capi::create::*;
use qcow2::capi::error::*;
use qcow2::capi::facts::*;
use qcow2::capi::image::*;
use qcow2::capi::io::*;
use qcow2::capi::map::*;
use qcow2::capi::opts::*;
use qcow2::capi::queue::*;
use qcow2::capi::resize::*;
use qcow2::capi::snapshot::*;
use qcow2::capi::storage::*;
use qcow2::capi::version::*;
use qcow2::image::options::OPTIONS;
use qcow2::storage::{IoDst, IoSrc, Storage};

use crate::bytes::Bytes;
use crate::disk::{Disk, END};
use crate::images::SEEDS;
use crate::rule;
use crate::subject::Subject;

/// Calls of one input.
const CALLS_MAX: usize = 80;
/// Memory that transfers use.
const BUFFER: usize = 256 << 10;
/// Room for structs, whatever size is claimed.
const ROOM: usize = 4096;

/// What the callbacks get: counted, so that each is given back once.
struct User {
    disk: Arc<Disk>,
    alive: Arc<AtomicUsize>,
    answer: c_int,
}

struct Calls {
    alive: Arc<AtomicUsize>,
    storages: [*mut qcow2_storage; 3],
    opts: [*mut qcow2_opts; 2],
    images: [*mut qcow2_image; 3],
    list: *mut qcow2_snapshots,
    queues: [*mut qcow2_queue; 2],
    memory: Vec<u8>,
    // For requests under way: nothing else uses it.
    queued: Vec<u8>,
}

unsafe extern "C" fn destroy(user: *mut c_void) {
    // SAFETY: from Box::into_raw in `Calls::user`; called once.
    let user = unsafe { Box::from_raw(user.cast::<User>()) };
    user.alive.fetch_sub(1, SeqCst);
}

fn user<'a>(user: *mut c_void) -> &'a User {
    // SAFETY: as above, and not destroyed yet.
    unsafe { &*user.cast::<User>() }
}

unsafe extern "C" fn pread(data: *mut c_void, buf: *mut c_void, length: usize, offset: u64) -> ssize_t {
    // SAFETY: memory of that length from the library.
    let piece = unsafe { IoDst::from_raw(buf.cast(), length) };
    user(data)
        .disk
        .read(&[piece], offset)
        .map_or_else(|e| -(e.raw_os_error().unwrap_or(5) as ssize_t), |n| n as ssize_t)
}

unsafe extern "C" fn pwrite(data: *mut c_void, buf: *const c_void, length: usize, offset: u64) -> ssize_t {
    // SAFETY: memory of that length from the library.
    let piece = unsafe { IoSrc::from_raw(buf.cast_mut().cast(), length) };
    let done = user(data).disk.write(&[piece], offset);
    done.map_or_else(|e| -(e.raw_os_error().unwrap_or(5) as ssize_t), |()| length as ssize_t)
}

unsafe extern "C" fn flush(data: *mut c_void) -> c_int {
    user(data).answer
}

unsafe extern "C" fn get_size(data: *mut c_void, size: *mut u64) -> c_int {
    // SAFETY: valid for a write.
    unsafe { *size = user(data).disk.size().unwrap_or(0) };
    0
}

unsafe extern "C" fn truncate(data: *mut c_void, size: u64) -> c_int {
    user(data).disk.truncate(size).map_or_else(|e| -e.raw_os_error().unwrap_or(5), |()| 0)
}

unsafe extern "C" fn punch_hole(data: *mut c_void, offset: u64, length: u64) -> c_int {
    user(data).disk.punch_hole(offset, length).map_or_else(|e| -e.raw_os_error().unwrap_or(5), |()| 0)
}

unsafe extern "C" fn log(data: *mut c_void, _level: u32, text: *const c_char) {
    let _ = user(data).answer;
    // SAFETY: a C string.
    rule!(!unsafe { CStr::from_ptr(text) }.is_empty(), "an empty line in the log");
}

unsafe extern "C" fn progress(data: *mut c_void, done: u64, total: u64) -> c_int {
    rule!(done <= total, "{done} of {total}");
    user(data).answer
}

unsafe extern "C" fn finding(data: *mut c_void, found: *const qcow2_finding) {
    let _ = user(data).answer;
    // SAFETY: valid during the call.
    rule!(!unsafe { CStr::from_ptr((*found).text) }.is_empty(), "a finding without a text");
}

unsafe extern "C" fn resolve(
    data: *mut c_void,
    name: *const c_char,
    _format: u32,
    depth: u32,
    storage: *mut *mut qcow2_storage,
) -> c_int {
    let user = user(data);
    // SAFETY: a C string.
    let _ = unsafe { CStr::from_ptr(name) }.to_bytes();
    if user.answer != 0 || depth > 3 {
        return -libc::ENOENT;
    }
    // SAFETY: ops and user go together; storage is valid for a write.
    unsafe { qcow2_storage_new(&whole_ops(), new_user(&user.alive, user.disk.bytes(), 0), storage) }
}

fn new_user(alive: &Arc<AtomicUsize>, bytes: Vec<u8>, answer: c_int) -> *mut c_void {
    alive.fetch_add(1, SeqCst);
    Box::into_raw(Box::new(User { disk: Arc::new(Disk::new(bytes)), alive: Arc::clone(alive), answer })).cast()
}

fn whole_ops() -> qcow2_storage_ops {
    qcow2_storage_ops {
        struct_size: size_of::<qcow2_storage_ops>(),
        pread: Some(pread),
        pwrite: Some(pwrite),
        preadv: None,
        pwritev: None,
        flush: Some(flush),
        get_size: Some(get_size),
        truncate: Some(truncate),
        destroy: Some(destroy),
        punch_hole: Some(punch_hole),
    }
}

/// Makes calls.
pub fn c_calls(input: &[u8]) {
    let mut input = Bytes::new(input);
    let alive = Arc::new(AtomicUsize::new(0));
    let mut calls = Calls {
        alive: Arc::clone(&alive),
        storages: [null_mut(); 3],
        opts: [null_mut(); 2],
        images: [null_mut(); 3],
        list: null_mut(),
        queues: [null_mut(); 2],
        memory: vec![0xd7; BUFFER],
        queued: vec![0xd7; BUFFER],
    };
    calls.storage(&mut input, 0);
    calls.open(&mut input, 0);
    for _ in 0..CALLS_MAX {
        if input.is_empty() {
            break;
        }
        calls.one(&mut input);
    }
    calls.end(&mut input);
    rule!(alive.load(SeqCst) == 0, "{} user pointers were not given back, or too often", alive.load(SeqCst));
}

/// A handle, or now and then NULL.
fn some<T>(input: &mut Bytes<'_>, from: &[*mut T]) -> *mut T {
    match input.u8() {
        n if n >= 0xf8 => null_mut(),
        n => from[n as usize % from.len()],
    }
}

/// A string, or now and then NULL.
fn name(input: &mut Bytes<'_>) -> Option<CString> {
    let known = ["first", "second", "1", "2", "one", "two", "three", "", "base", "/", "../x"];
    match input.u8() {
        n if n >= 0xf8 => None,
        n if n >= 0x80 => {
            let bytes: Vec<u8> = input.take((n & 0x1f) as usize).iter().copied().filter(|&byte| byte != 0).collect();
            CString::new(bytes).ok()
        }
        n => CString::new(known[n as usize % known.len()]).ok(),
    }
}

fn pointer(name: &Option<CString>) -> *const c_char {
    name.as_ref().map_or(null(), |name| name.as_ptr())
}

#[track_caller]
fn result(code: c_int) {
    crate::trace!("line {}: {code}", std::panic::Location::caller().line());
    rule!((-4095..=0).contains(&code), "{code} is neither 0 nor an errno");
    if code < 0 {
        // SAFETY: a string that is valid until the next call that fails.
        let text = unsafe { CStr::from_ptr(qcow2_last_error()) };
        rule!(!text.is_empty() && qcow2_last_error_code() != QCOW2_ERR_PANIC, "{code}: {text:?}");
    }
}

/// Flags: mostly known ones.
fn flags(input: &mut Bytes<'_>) -> u32 {
    match input.u8() {
        n if n >= 0xf0 => input.u32(),
        n => u32::from(n & 0xf),
    }
}

impl Calls {
    fn user(&self, input: &mut Bytes<'_>, bytes: Vec<u8>) -> *mut c_void {
        let answer = if input.u8() >= 0xf0 { -libc::EIO } else { 0 };
        new_user(&self.alive, bytes, answer)
    }

    fn storage(&mut self, input: &mut Bytes<'_>, slot: usize) {
        let subject = Subject::take(input);
        let mut ops = whole_ops();
        let how = input.u8();
        if how & 0xf == 0xf {
            (ops.pwrite, ops.truncate, ops.punch_hole) = (None, None, None);
        }
        // A later version's struct: longer, with a tail that is zero or not.
        #[repr(C)]
        struct Longer(qcow2_storage_ops, [u8; 64]);
        let mut longer = Longer(ops, [0; 64]);
        match how >> 4 {
            1 => longer.0.struct_size += 64,
            2 => (longer.0.struct_size, longer.1[63]) = (longer.0.struct_size + 64, 1),
            3 => longer.0.struct_size = input.u8() as usize,
            _ => {}
        }
        // SAFETY: a slot of ours that nothing points to any more; ops and user go together.
        unsafe {
            qcow2_storage_free(self.storages[slot]);
            let user = self.user(input, subject.bytes);
            let made = qcow2_storage_new(&longer.0, user, &mut self.storages[slot]);
            result(made);
            if made < 0 {
                destroy(user); // it is still the caller's
            }
        }
    }

    fn open(&mut self, input: &mut Bytes<'_>, slot: usize) {
        self.close(slot);
        let (storage, opts) = (some(input, &self.storages), some(input, &self.opts));
        // SAFETY: live or NULL.
        result(unsafe { qcow2_open_storage(storage, opts, &mut self.images[slot]) });
    }

    fn close(&mut self, slot: usize) {
        // SAFETY: an image that nobody uses any more, or NULL; its queue may live on.
        result(unsafe { qcow2_close(std::mem::replace(&mut self.images[slot], null_mut())) });
    }

    fn one(&mut self, input: &mut Bytes<'_>) {
        match input.u8() % 16 {
            0 => self.handles(input),
            1 => self.options(input),
            2..=4 => self.transfer(input),
            5 => self.zero(input),
            6 => self.facts(input),
            7 => self.map(input),
            8 | 9 => self.snapshots(input),
            10 | 11 => self.bitmaps(input),
            12 => self.resize(input),
            13 => self.check(input),
            14 => self.queues(input),
            _ => {
                // SAFETY: live or NULL.
                result(unsafe { qcow2_flush(some(input, &self.images)) });
            }
        }
    }

    fn handles(&mut self, input: &mut Bytes<'_>) {
        let (what, slot) = (input.u8(), input.u8() as usize % 3);
        match what % 8 {
            0 => self.storage(input, slot),
            1..=3 => self.open(input, slot),
            4 => self.close(slot),
            5 => {
                let size = input.place(END, 512);
                let (storage, opts) = (some(input, &self.storages), some(input, &self.opts));
                // SAFETY: live or NULL.
                result(unsafe { qcow2_create_storage(storage, size, opts, flags(input)) });
            }
            6 => {
                // SAFETY: strings or NULL; no such file can be there, nor made.
                unsafe {
                    self.close(slot);
                    let opts = some(input, &self.opts);
                    let path = [c"/nonexistent/disk".as_ptr(), c"".as_ptr(), null()][input.u8() as usize % 3];
                    let opened = qcow2_open(path, opts, &mut self.images[slot]);
                    rule!(opened < 0 && self.images[slot].is_null(), "what is not there is open");
                    result(opened);
                    result(qcow2_create(path, input.u64(), opts, flags(input)));
                    result(qcow2_open_fd(-1, opts, &mut self.images[slot]));
                    result(qcow2_open_storage(null_mut(), null(), null_mut()));
                }
            }
            _ => {
                // SAFETY: a slot of ours; images keep what they need.
                unsafe { qcow2_storage_free(std::mem::replace(&mut self.storages[slot], null_mut())) };
            }
        }
    }

    fn options(&mut self, input: &mut Bytes<'_>) {
        let (what, slot) = (input.u8(), input.u8() as usize % 2);
        if what & 0x80 == 0x80 || self.opts[slot].is_null() {
            // SAFETY: options that nobody uses any more, or NULL.
            unsafe { qcow2_opts_free(std::mem::replace(&mut self.opts[slot], qcow2_opts_new())) };
        }
        let opts = some(input, &self.opts);
        let key = match input.u8() {
            n if n & 7 == 7 => name(input),
            n => CString::new(OPTIONS[n as usize % OPTIONS.len()].key).ok(),
        };
        let key = pointer(&key);
        // SAFETY: live handles or NULL, strings or NULL, functions with their users.
        unsafe {
            match what % 9 {
                0 | 1 => {
                    let values = [c"on", c"off", c"64k", c"4096", c"raw", c"qcow2", c"zstd", c"0.10", c"first"];
                    let value = match input.u8() {
                        n if n & 7 == 7 => name(input),
                        n => Some(values[n as usize % values.len()].to_owned()),
                    };
                    result(qcow2_opts_set_str(opts, key, pointer(&value)));
                }
                2 => result(qcow2_opts_set_u64(opts, key, input.u64() >> (input.u8() % 64))),
                3 => result(qcow2_opts_set_bool(opts, key, input.u8().into())),
                4 => {
                    let storage = some(input, &self.storages);
                    let (role, position) = (u32::from(input.u8() % 4), u32::from(input.u8() % 4));
                    result(qcow2_opts_set_storage(opts, role, position, storage));
                }
                5 => {
                    let resolve: qcow2_resolve_fn = if input.u8() < 0xe0 { Some(resolve) } else { None };
                    let user = self.user(input, SEEDS[0].bytes.clone());
                    result(qcow2_opts_set_resolver(opts, resolve, user, Some(destroy)));
                }
                6 => result(qcow2_opts_set_log(opts, Some(log), self.user(input, Vec::new()), Some(destroy))),
                7 => result(qcow2_opts_set_progress(opts, Some(progress), self.user(input, Vec::new()), Some(destroy))),
                _ => result(qcow2_opts_set_finding(opts, Some(finding), self.user(input, Vec::new()), Some(destroy))),
            }
        }
    }

    fn transfer(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let how = input.u8();
        // SAFETY: live or NULL.
        let size = unsafe { qcow2_size(image) }.max(0) as u64;
        let offset = input.place(size, 4096);
        let length = usize::from(input.u16()) << (how >> 6);
        let flags = flags(input);
        let buffer = self.memory.as_mut_ptr();
        let part = length.min(BUFFER);
        let first = part / 3;
        // SAFETY: the pieces lie in `memory`; live handles or NULL.
        unsafe {
            let pieces = [
                iovec { iov_base: buffer.cast(), iov_len: first },
                iovec { iov_base: null_mut(), iov_len: 0 },
                iovec { iov_base: buffer.add(first).cast(), iov_len: part - first },
            ];
            let count = if how & 0x20 == 0x20 { c_int::from(input.u8() as i8).min(3) } else { 3 };
            let vector = if how & 0x1f == 0x1f { null() } else { pieces.as_ptr() };
            match how % 4 {
                0 => result(qcow2_pread(image, buffer.cast(), part, offset, flags)),
                1 => result(qcow2_pwrite(image, buffer.cast(), part, offset, flags)),
                2 => result(qcow2_preadv(image, vector, count, offset, flags)),
                _ => result(qcow2_pwritev(image, vector, count, offset, flags)),
            }
        }
    }

    fn zero(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        // SAFETY: live or NULL.
        unsafe {
            let size = qcow2_size(image).max(0) as u64;
            let (offset, length, flags) = (input.place(size, 4096), input.place(size, 4096), flags(input));
            match input.u8() & 1 {
                0 => result(qcow2_write_zeroes(image, offset, length, flags)),
                _ => result(qcow2_discard(image, offset, length, flags & !0xe)),
            }
        }
    }

    fn facts(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let mut room = [0u64; ROOM / 8];
        let size = usize::from(input.u16()) % (ROOM + 1);
        let out = room.as_mut_ptr();
        // SAFETY: `room` is aligned and as long as any size that is claimed; live handles or NULL.
        unsafe {
            match input.u8() % 6 {
                0 => result(qcow2_get_info(image, out.cast(), size)),
                1 => result(qcow2_get_stats(image, out.cast(), size)),
                2 => {
                    let mut json = null_mut();
                    result(qcow2_info_json(image, &mut json));
                    qcow2_string_free(json);
                }
                3 => result(qcow2_option_describe(input.u8().into(), out.cast(), size)),
                4 => {
                    let bytes = input.take(16);
                    rule!(qcow2_probe(bytes.as_ptr().cast(), bytes.len()) >= -4095, "no errno");
                    result(qcow2_probe(null(), 7).min(0));
                }
                _ => {
                    qcow2_has_feature(pointer(&name(input)));
                    result(qcow2_get_info(image, null_mut(), size));
                    rule!(qcow2_version_number() > 0, "no version");
                }
            }
        }
        rule!(room[size.div_ceil(8)..].iter().all(|&word| word == 0), "written past the size that was given");
    }

    fn map(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let mut n = 0usize;
        let max = usize::from(input.u8() % 60);
        let mut room = [0u64; 8 * 64];
        // SAFETY: room for `max` extents of 64 bytes; live handles or NULL.
        unsafe {
            let size = qcow2_size(image).max(0) as u64;
            let (offset, length) = (input.place(size, 4096), input.place(size, 4096));
            let extents = if max == 7 { null_mut() } else { room.as_mut_ptr().cast() };
            result(qcow2_map(image, offset, length, flags(input) & !7, extents, max, &mut n));
        }
        rule!(n <= max, "{n} extents instead of {max}");
    }

    fn snapshots(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let name = name(input);
        let name = pointer(&name);
        let what = input.u8();
        // SAFETY: live handles or NULL, strings or NULL, structs of the size that they say.
        unsafe {
            match what % 8 {
                0 => {
                    #[repr(C)]
                    struct Longer(qcow2_snapshot_facts, [u8; 32]);
                    let struct_size = size_of::<qcow2_snapshot_facts>() + if what >= 0xc0 { 32 } else { 0 };
                    let (vm_clock_nsec, date_sec, date_nsec) = (input.u64(), input.u32(), input.u32());
                    let facts = qcow2_snapshot_facts { struct_size, vm_clock_nsec, date_sec, date_nsec };
                    let facts = Longer(facts, [(what >= 0xe0) as u8; 32]);
                    result(qcow2_snapshot_create(image, name, &facts.0, flags(input) & !0xf));
                }
                1 => result(qcow2_snapshot_create(image, name, null(), flags(input))),
                2 => result(qcow2_snapshot_apply(image, name, flags(input) & !0xf)),
                3 => {
                    let user = self.user(input, Vec::new());
                    result(qcow2_snapshot_delete(image, name, flags(input) & !0xf, Some(progress), user));
                    destroy(user);
                }
                4 => {
                    let slot = input.u8() as usize % 3;
                    if self.images[slot] != image {
                        self.close(slot);
                        result(qcow2_snapshot_open(image, name, flags(input) & !0xf, &mut self.images[slot]));
                    }
                }
                5 | 6 => {
                    qcow2_snapshots_free(std::mem::replace(&mut self.list, null_mut()));
                    result(qcow2_snapshot_list(image, &mut self.list));
                }
                _ => {
                    let mut room = [0u64; ROOM / 8];
                    let size = usize::from(input.u16()) % (ROOM + 1);
                    let count = qcow2_snapshots_count(self.list);
                    result(qcow2_snapshots_get(self.list, input.u8().into(), room.as_mut_ptr().cast(), size));
                    rule!(count <= 65536, "{count} snapshots");
                }
            }
        }
    }

    fn bitmaps(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let (name, other) = (name(input), name(input));
        let (name, other) = (pointer(&name), pointer(&other));
        // SAFETY: live handles or NULL, strings or NULL, room as long as is claimed.
        unsafe {
            match input.u8() % 8 {
                0 => result(qcow2_bitmap_add(image, name, 1 << (input.u8() % 64), flags(input) & !0xe)),
                1 => result(qcow2_bitmap_remove(image, name)),
                2 => result(qcow2_bitmap_clear(image, name)),
                3 => result(qcow2_bitmap_enable(image, name)),
                4 => result(qcow2_bitmap_disable(image, name)),
                5 => result(qcow2_bitmap_merge(image, name, some(input, &self.images), other)),
                6 => {
                    let mut room = [0u64; ROOM / 8];
                    let size = usize::from(input.u16()) % (ROOM + 1);
                    result(qcow2_bitmap_describe(image, input.u8().into(), room.as_mut_ptr().cast(), size));
                }
                _ => {
                    let (mut n, mut room) = (0usize, [0u64; 8 * 16]);
                    let size = qcow2_size(image).max(0) as u64;
                    let offset = input.place(size, 4096);
                    let length = input.place(size, 4096);
                    let extents = room.as_mut_ptr().cast();
                    result(qcow2_bitmap_extents(image, name, offset, length, flags(input) & !0xf, extents, 16, &mut n));
                    rule!(n <= 16, "{n} extents instead of 16");
                }
            }
        }
    }

    fn resize(&mut self, input: &mut Bytes<'_>) {
        let image = some(input, &self.images);
        let size = if input.u8() & 3 == 0 { input.u64() } else { input.place(1 << 20, 4096) };
        // SAFETY: live or NULL.
        result(unsafe { qcow2_resize(image, size, some(input, &self.opts), flags(input)) });
    }

    fn check(&mut self, input: &mut Bytes<'_>) {
        let mut room = [0u64; ROOM / 8];
        let size = usize::from(input.u16()) % (ROOM + 1);
        let (storage, opts) = (some(input, &self.storages), some(input, &self.opts));
        // SAFETY: live or NULL; room as long as is claimed.
        unsafe {
            let out = room.as_mut_ptr().cast();
            match input.u8() {
                0xff => result(qcow2_check(c"/nonexistent/disk".as_ptr(), opts, 0, out, size)),
                0xfe => result(qcow2_check_fd(-1, opts, 0, out, size)),
                n if n & 0xc0 == 0x80 => {
                    let image = some(input, &self.images);
                    result(qcow2_check_image(image, opts, flags(input) * u32::from(n & 1), out, size))
                }
                _ => result(qcow2_check_storage(storage, opts, flags(input), out, size)),
            }
        }
    }

    fn queues(&mut self, input: &mut Bytes<'_>) {
        // Of few inputs a second one: what was kept before there were two means the same.
        let (slot, what) = match input.u8() {
            n @ 0xf0..=0xfe => (1, n - 0xf0),
            n => (0, n),
        };
        // SAFETY: live handles or NULL; buffers that live as long as the queue and that nobody else uses.
        unsafe {
            let queue = &mut self.queues[slot];
            if queue.is_null() || what == [0xff, 14][slot] {
                qcow2_queue_free(std::mem::replace(queue, null_mut()));
                let image = some(input, &self.images);
                result(qcow2_queue_new(image, u32::from(input.u8() % 40), u32::from(input.u8() % 4), queue));
                return;
            }
            let queue = *queue;
            let (offset, length) = (u64::from(input.u16()) << 4, usize::from(input.u16()));
            let (flags, user_data) = (flags(input), u64::from(what));
            let piece = iovec { iov_base: self.queued.as_mut_ptr().cast(), iov_len: length };
            let mut done = [const { qcow2_completion { user_data: 0, result: 0, error_code: 0, reserved: [0; 2] } }; 8];
            match what % 10 {
                0 => result(qcow2_queue_readv(queue, &piece, 1, offset, flags & !0xf, user_data)),
                1 | 2 => result(qcow2_queue_writev(queue, &piece, 1, offset, flags, user_data)),
                3 => result(qcow2_queue_flush(queue, user_data)),
                4 => result(qcow2_queue_write_zeroes(queue, offset, length as u64, flags, user_data)),
                5 => result(qcow2_queue_discard(queue, offset, length as u64, flags & !0xf, user_data)),
                6 => result(qcow2_queue_submit(queue).min(0)),
                7 => result(qcow2_queue_cancel(queue, user_data).min(0)),
                8 => result(qcow2_queue_fd(queue).min(0)),
                _ => {
                    let n = input.u8();
                    let max = u32::from(n % 9);
                    // As long as it takes, now and then: nobody but this thread could let what it waits for go on.
                    let timeout_ns = if n < 0x80 { 1_000_000 } else { -1 };
                    let reaped = qcow2_queue_reap(queue, done.as_mut_ptr(), max, max.min(1), timeout_ns);
                    result(reaped.min(0));
                    rule!(reaped <= max as c_int, "{reaped} completions instead of {max}");
                }
            }
        }
    }

    fn end(&mut self, input: &mut Bytes<'_>) {
        // SAFETY: all of them are ours, and used no more.
        unsafe {
            let first = input.u8();
            for (slot, queue) in self.queues.iter_mut().enumerate().filter(|(slot, _)| first >> slot & 1 == 1) {
                crate::trace!("queue {slot} goes before the images");
                qcow2_queue_free(std::mem::replace(queue, null_mut()));
            }
            (0..3).for_each(|slot| self.close(slot));
            qcow2_snapshots_free(self.list);
            self.queues.into_iter().for_each(|queue| qcow2_queue_free(queue));
            self.storages.into_iter().for_each(|storage| qcow2_storage_free(storage));
            self.opts.into_iter().for_each(|opts| qcow2_opts_free(opts));
        }
    }
}
