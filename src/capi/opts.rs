//! Options
//!
//! One object holds the options of open and create calls. Keys are named as in `qemu-img create -o` where such a key
//! exists; qcow2_option_describe() lists them all. A key or a value that is not known is refused at once, by name; a
//! key that the call does not use (cluster_size in an open, say) is refused by that call, by name.
//!
//! An option object is used by one thread at a time; calls that open or create copy what they need.

use std::ffi::CString;
use std::sync::{Arc, OnceLock};

use libc::{c_char, c_int, c_void};

use super::arguments::text;
use super::boundary::{call, null};
use super::check::{qcow2_finding, qcow2_finding_fn};
use super::storage::{UserData, qcow2_storage, status, take};
use super::structs::{self, AbiStruct};
use crate::error::{Error, IoOp, Result};
use crate::image::options::{OPTIONS, OptionInfo, OptionKind};
use crate::image::{BackingFormat, CreateOptions, LogLevel, Logger, OpenOptions, Resolver};
use crate::storage::Storage;

/// Options for opening and creating images.
#[derive(Default)]
pub struct qcow2_opts {
    pub(super) open: OpenOptions,
    pub(super) create: CreateOptions,
    progress: Option<Callback>,
    finding: Option<FindingCallback>,
    /// Which keys were set: bit = index in [`OPTIONS`].
    set: u64,
}

/// The caller's progress function.
struct Callback {
    progress: unsafe extern "C" fn(user: *mut c_void, done: u64, total: u64) -> c_int,
    data: UserData,
}

/// The caller's function for findings.
struct FindingCallback {
    finding: unsafe extern "C" fn(user: *mut c_void, finding: *const qcow2_finding),
    data: UserData,
}

const _: () = assert!(OPTIONS.len() <= 64, "the keys no longer fit `qcow2_opts::set`");

/// The calls that take options.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Those that open an image.
    Open,
    /// Those that create one.
    Create,
    /// Those that check one.
    Check,
    /// The one that gives a disk another size.
    Resize,
}

impl Call {
    fn uses(self, option: &OptionInfo) -> bool {
        match self {
            Self::Open => option.open,
            Self::Create => option.create,
            Self::Check => ["locking", "check_memory"].contains(&option.key),
            Self::Resize => option.resize,
        }
    }

    /// The error for an option that this call would silently leave out.
    pub(super) fn unused(self, key: &str) -> Error {
        let (here, there) = match self {
            Self::Open => ("opening an image", "creating one"),
            Self::Create => ("creating an image", "opening one"),
            Self::Check if key == "resolver" || key == "storage" => ("checking an image", "opening one"),
            Self::Check => ("checking an image", "opening or creating one"),
            Self::Resize => ("resizing an image", "opening or creating one"),
        };
        Error::OptionUnused { key: key.to_owned(), here, there }
    }
}

impl qcow2_opts {
    /// Refuses the first thing that was set and that `call` does not use.
    pub(super) fn refuse_unused(&self, call: Call) -> Result<()> {
        let was_set = OPTIONS.iter().enumerate().filter(|(index, _)| self.set >> index & 1 == 1);
        if let Some((_, option)) = was_set.into_iter().find(|(_, option)| !call.uses(option)) {
            return Err(call.unused(option.key));
        }
        match call {
            Call::Create | Call::Check | Call::Resize if self.open.resolver.is_some() => Err(call.unused("resolver")),
            Call::Create | Call::Check | Call::Resize if !self.open.backing_storages.is_empty() => {
                Err(call.unused("storage"))
            }
            Call::Create if self.open.data_file_storages.len() > 1 => Err(call.unused("storage")),
            Call::Check | Call::Resize if !self.open.data_file_storages.is_empty() => Err(call.unused("storage")),
            Call::Open if self.progress.is_some() => Err(call.unused("progress")),
            Call::Open | Call::Create if self.finding.is_some() => Err(call.unused("finding")),
            _ => Ok(()),
        }
    }

    /// Whether the caller wants to be told of findings.
    pub(super) fn wants_findings(&self) -> bool {
        self.finding.is_some()
    }

    /// Tells the caller of a finding.
    pub(super) fn tell_finding(&self, finding: &qcow2_finding) {
        if let Some(callback) = &self.finding {
            // SAFETY: the caller's function with its own pointer, and a finding that lives through the call.
            unsafe { (callback.finding)(callback.data.user, finding) }
        }
    }

    /// Sets or takes away the function for findings.
    pub(super) fn set_finding(&mut self, finding: qcow2_finding_fn, data: UserData) {
        self.finding = finding.map(|finding| FindingCallback { finding, data });
    }

    /// Tells the caller how far a call has come; `true`: go on.
    pub(super) fn tell(&self, done: u64, total: u64) -> bool {
        self.progress.as_ref().is_none_or(|callback| {
            // SAFETY: the caller's function with its own pointer.
            unsafe { (callback.progress)(callback.data.user, done, total) == 0 }
        })
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let Some(index) = OPTIONS.iter().position(|option| option.key == key) else {
            return Err(Error::UnknownOption { key: key.to_owned() });
        };
        if OPTIONS[index].open {
            self.open.set(key, value)?;
        }
        if OPTIONS[index].create {
            self.create.set(key, value)?;
        }
        self.set |= 1 << index;
        Ok(())
    }
}

/// Sets one key.
///
/// # Safety
/// `opts` is NULL or came from `qcow2_opts_new`, used by this thread alone; `key` is NULL or a C string.
unsafe fn set(opts: *mut qcow2_opts, key: *const c_char, value: impl FnOnce() -> Result<String>) -> c_int {
    call(|| {
        // SAFETY: the caller's promise.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        // SAFETY: the caller's promise.
        opts.set(unsafe { text("key", key) }?, &value()?)
    })
}

/// Makes an option object in which nothing is set.
///
/// Returns the object, which the caller frees with qcow2_opts_free(). Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn qcow2_opts_new() -> *mut qcow2_opts {
    Box::into_raw(Box::default())
}

/// Frees an option object. Images that were opened with it stay as they are.
///
/// opts: not to be used any more; NULL is a no-op
///
/// One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_free(opts: *mut qcow2_opts) {
    if opts.is_null() {
        return;
    }
    // SAFETY: came from Box::into_raw in `qcow2_opts_new`, and the caller uses it no more.
    let opts = unsafe { Box::from_raw(opts) };
    call(move || {
        drop(opts);
        Ok(())
    });
}

/// Sets an option of any kind from text.
///
/// opts:  the options
/// key:   the name of the option
/// value: a number in decimal digits, where it counts bytes with a suffix k, M, G or T if you like; "on" or "off"; a
///        word; or a text. It is copied
///
/// Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_str(opts: *mut qcow2_opts, key: *const c_char, value: *const c_char) -> c_int {
    // SAFETY: NULL or C strings by the manual above.
    unsafe { set(opts, key, || Ok(text("value", value)?.to_owned())) }
}

/// Sets an option that is a number.
///
/// opts:  the options
/// key:   the name of the option
/// value: the number, in bytes where it is a size
///
/// Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_u64(opts: *mut qcow2_opts, key: *const c_char, value: u64) -> c_int {
    // SAFETY: NULL or a C string by the manual above.
    unsafe { set(opts, key, || Ok(value.to_string())) }
}

/// Sets an option that is on or off.
///
/// opts:  the options
/// key:   the name of the option
/// value: 0 for off, anything else for on
///
/// Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_bool(opts: *mut qcow2_opts, key: *const c_char, value: c_int) -> c_int {
    // SAFETY: NULL or a C string by the manual above.
    unsafe { set(opts, key, || Ok(if value != 0 { "on" } else { "off" }.to_owned())) }
}

/// Kind of an option: "on" or "off"; qcow2_opts_set_bool() or _set_str().
pub const QCOW2_OPTION_BOOL: u32 = 1;
/// Kind of an option: a number; qcow2_opts_set_u64() or _set_str().
pub const QCOW2_OPTION_NUMBER: u32 = 2;
/// Kind of an option: a number of bytes; qcow2_opts_set_u64() or _set_str().
pub const QCOW2_OPTION_SIZE: u32 = 3;
/// Kind of an option: any text; qcow2_opts_set_str().
pub const QCOW2_OPTION_TEXT: u32 = 4;
/// Kind of an option: one of the words in qcow2_option.values; qcow2_opts_set_str().
pub const QCOW2_OPTION_CHOICE: u32 = 5;

/// The option is for the calls that open an image.
pub const QCOW2_OPTION_FOR_OPEN: u32 = 1 << 0;
/// The option is for the calls that create an image.
pub const QCOW2_OPTION_FOR_CREATE: u32 = 1 << 1;
/// The option is for qcow2_resize().
pub const QCOW2_OPTION_FOR_RESIZE: u32 = 1 << 2;

/// An option that the library knows. The strings are static. Members may be appended in later versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_option {
    /// The key.
    pub name: *const c_char,
    /// What it does, in one line.
    pub help: *const c_char,
    /// The value it has when it is not set; "" for none.
    pub default_value: *const c_char,
    /// The words that it can be, with a comma and a space between them, where its kind is QCOW2_OPTION_CHOICE; else "".
    pub values: *const c_char,
    /// A QCOW2_OPTION_ kind.
    pub kind: u32,
    /// QCOW2_OPTION_FOR_ bits.
    pub used_by: u32,
}

// SAFETY: repr(C), pointers and integers without padding.
unsafe impl AbiStruct for qcow2_option {
    const FIRST_SIZE: usize = 4 * size_of::<usize>() + 8;
}

/// Describes one of the options that this version of the library knows; count index up from 0 until it fails.
///
/// index:       which; an option's index may change from version to version, its name does not
/// option:      filled in
/// option_size: sizeof(struct qcow2_option)
///
/// Returns 0, or -EINVAL past the last one. Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_option_describe(index: usize, option: *mut qcow2_option, option_size: usize) -> c_int {
    call(|| {
        let (Some(info), Some(texts)) = (OPTIONS.get(index), option_texts().get(index)) else {
            let value = index.to_string();
            return Err(Error::ArgumentValue { name: "index", value, expected: "less than the number of options" });
        };
        let kind = match info.kind {
            OptionKind::Bool => QCOW2_OPTION_BOOL,
            OptionKind::Number => QCOW2_OPTION_NUMBER,
            OptionKind::Size => QCOW2_OPTION_SIZE,
            OptionKind::Text => QCOW2_OPTION_TEXT,
            OptionKind::Choice(_) => QCOW2_OPTION_CHOICE,
        };
        let open = if info.open { QCOW2_OPTION_FOR_OPEN } else { 0 };
        let create = if info.create { QCOW2_OPTION_FOR_CREATE } else { 0 };
        let resize = if info.resize { QCOW2_OPTION_FOR_RESIZE } else { 0 };
        let value = qcow2_option {
            name: texts.name.as_ptr(),
            help: texts.help.as_ptr(),
            default_value: texts.default.as_ptr(),
            values: texts.values.as_ptr(),
            kind,
            used_by: open | create | resize,
        };
        // SAFETY: NULL or option_size bytes by the manual above.
        unsafe { structs::fill("option", option, option_size, &value) }
    })
}

/// The texts of an option, as C strings.
struct OptionTexts {
    name: CString,
    help: CString,
    default: CString,
    values: CString,
}

/// Made at the first use, in the order of [`OPTIONS`], and kept.
fn option_texts() -> &'static [OptionTexts] {
    static TEXTS: OnceLock<Vec<OptionTexts>> = OnceLock::new();
    // The table's texts are this crate's own, and have no NUL.
    let c = |text: &str| CString::new(text).unwrap_or_default();
    let texts = |option: &OptionInfo| OptionTexts {
        name: c(option.key),
        help: c(option.help),
        default: c(option.default),
        values: if let OptionKind::Choice(words) = option.kind { c(&words.join(", ")) } else { CString::default() },
    };
    TEXTS.get_or_init(|| OPTIONS.iter().map(texts).collect())
}

/// Role of a storage: a file of the backing chain.
pub const QCOW2_ROLE_BACKING: u32 = 1;
/// Role of a storage: the external data file of the image, or of a file of its backing chain.
pub const QCOW2_ROLE_DATA_FILE: u32 = 2;

/// Deepest image whose external data file can be given.
const DATA_FILE_DEPTH_MAX: u32 = 1000;

/// Gives an open the storages that the image refers to, so that nothing is opened by name, or qcow2_create_storage() the
/// storage that guest data goes to.
///
/// opts:     the options
/// role:     QCOW2_ROLE_BACKING or QCOW2_ROLE_DATA_FILE
/// position: for QCOW2_ROLE_BACKING, 0 is the image's backing file, 1 the backing file of that, and so on; given in that
///           order. For QCOW2_ROLE_DATA_FILE, 0 is the image's own external data file, 1 that of its backing file, and so
///           on; in any order
/// storage:  a backing file, and what belongs to one, opened for reading at least, and never written to; the image's own
///           external data file for writing too, unless the image is opened with "read_only". The options, and images
///           opened with them, keep a reference of their own
///
/// Names stored in the images are not looked at then; declared formats are.
/// Returns 0 or -EINVAL. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_storage(
    opts: *mut qcow2_opts,
    role: u32,
    position: u32,
    storage: *mut qcow2_storage,
) -> c_int {
    call(|| {
        // SAFETY: NULL or an option object that only this thread uses, by the manual above.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        // SAFETY: NULL or a live storage by the manual above.
        let storage = unsafe { storage.as_ref() }.ok_or_else(|| null("storage"))?;
        let wrong = |name, value: u32, expected| Err(Error::ArgumentValue { name, value: value.to_string(), expected });
        if role == QCOW2_ROLE_DATA_FILE {
            if position > DATA_FILE_DEPTH_MAX {
                return wrong("position", position, "a depth of 0 to 1000");
            }
            let storages = &mut opts.open.data_file_storages;
            storages.resize(storages.len().max(position as usize + 1), None);
            storages[position as usize] = Some(Arc::clone(&storage.inner));
            return Ok(());
        }
        if role != QCOW2_ROLE_BACKING {
            return wrong("role", role, "QCOW2_ROLE_BACKING or QCOW2_ROLE_DATA_FILE");
        }
        let storages = &mut opts.open.backing_storages;
        let (position_index, count) = (position as usize, storages.len());
        match storages.get_mut(position_index) {
            Some(place) => *place = Arc::clone(&storage.inner),
            None if position_index == count => storages.push(Arc::clone(&storage.inner)),
            None => return wrong("position", position, "positions in order, from 0, without a gap"),
        }
        Ok(())
    })
}

/// Called once with the user pointer that came with it, when nothing can use that pointer any more.
pub type qcow2_destroy_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// Format of a backing file, as its image declares it: qcow2.
pub const QCOW2_FORMAT_QCOW2: u32 = 1;
/// Format of a backing file, as its image declares it, and of everything that is not known: raw.
pub const QCOW2_FORMAT_RAW: u32 = 2;
/// In place of a format: the reference is to an external data file, for reading only.
pub const QCOW2_FORMAT_DATA_FILE: u32 = 3;
/// In place of a format: the reference is to an external data file, for reading and writing.
pub const QCOW2_FORMAT_DATA_FILE_WRITABLE: u32 = 4;

/// Finds the file behind a reference.
///
/// user:    the pointer given with the function
/// name:    the reference as stored in the image, untrusted
/// format:  QCOW2_FORMAT_QCOW2 or QCOW2_FORMAT_RAW, as declared in the image; or QCOW2_FORMAT_DATA_FILE or
///          QCOW2_FORMAT_DATA_FILE_WRITABLE. Fail with -EACCES for what you do not expect
/// depth:   how deep in the chain the image is that has the reference: 0 for the image that is being opened
/// storage: where the function puts a storage; the library takes that reference over
///
/// Returns 0, or a negative errno that makes the open fail with it.
pub type qcow2_resolve_fn = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        name: *const c_char,
        format: u32,
        depth: u32,
        storage: *mut *mut qcow2_storage,
    ) -> c_int,
>;

struct CallbackResolver {
    resolve: unsafe extern "C" fn(*mut c_void, *const c_char, u32, u32, *mut *mut qcow2_storage) -> c_int,
    data: UserData,
}

impl Resolver for CallbackResolver {
    fn resolve(&self, name: &str, format: BackingFormat, depth: u32) -> Result<Arc<dyn Storage>> {
        self.ask(
            name,
            match format {
                BackingFormat::Qcow2 => QCOW2_FORMAT_QCOW2,
                BackingFormat::Raw => QCOW2_FORMAT_RAW,
            },
            depth,
        )
    }

    fn resolve_data_file(&self, name: &str, writable: bool, depth: u32) -> Result<Arc<dyn Storage>> {
        self.ask(name, if writable { QCOW2_FORMAT_DATA_FILE_WRITABLE } else { QCOW2_FORMAT_DATA_FILE }, depth)
    }
}

impl CallbackResolver {
    fn ask(&self, name: &str, format: u32, depth: u32) -> Result<Arc<dyn Storage>> {
        let name =
            CString::new(name).map_err(|_| Error::Path { path: name.to_owned(), why: "has a NUL byte in it" })?;
        let mut storage = std::ptr::null_mut();
        // SAFETY: the caller's function with its own pointer, a C string, and a place for the result.
        let code = unsafe { (self.resolve)(self.data.user, name.as_ptr(), format, depth, &raw mut storage) };
        status(code).map_err(|e| Error::io(IoOp::Open, 0, &e))?;
        // SAFETY: a storage of the library whose reference the manual makes ours.
        unsafe { take(storage) }
    }
}

/// Lets the caller decide which file a reference in an image means. It is asked for each backing file and external data
/// file instead of opening paths, whatever option "backing" says.
///
/// opts:    the options
/// resolve: the function; NULL takes an earlier resolver away. Called during the open only, in its thread
/// user:    passed to it
/// destroy: called once with user when nothing uses the resolver any more (the options, and images opened with them);
///          NULL if there is nothing to do. Called too when this call fails
///
/// Returns 0 or -EINVAL. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_resolver(
    opts: *mut qcow2_opts,
    resolve: qcow2_resolve_fn,
    user: *mut c_void,
    destroy: qcow2_destroy_fn,
) -> c_int {
    call(|| {
        let data = UserData { user, destroy };
        // SAFETY: NULL or an option object that only this thread uses, by the manual above.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        opts.open.resolver = resolve.map(|resolve| Arc::new(CallbackResolver { resolve, data }) as Arc<dyn Resolver>);
        Ok(())
    })
}

/// Level of a log message: something is wrong, an image that turned out to be corrupt for example.
pub const QCOW2_LOG_ERROR: u32 = 1;
/// Level of a log message: something to look at.
pub const QCOW2_LOG_WARNING: u32 = 2;
/// Level of a log message: something that is good to know.
pub const QCOW2_LOG_INFO: u32 = 3;

/// Takes a message.
///
/// user:  the pointer given with the function
/// level: a QCOW2_LOG_ number; more may come
/// text:  one line, valid during the call
pub type qcow2_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: u32, text: *const c_char)>;

/// Where messages go that belong to no call's result; the library itself prints nothing.
///
/// opts:    the options
/// log:     the function; NULL takes an earlier one away. Called from any thread that uses the image, from several at
///          once; it must not call into that image
/// user:    passed to it
/// destroy: called once with user when nothing uses the function any more (the options, and images opened with them);
///          NULL if there is nothing to do. Called too when this call fails
///
/// Returns 0 or -EINVAL. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_log(
    opts: *mut qcow2_opts,
    log: qcow2_log_fn,
    user: *mut c_void,
    destroy: qcow2_destroy_fn,
) -> c_int {
    call(|| {
        let data = UserData { user, destroy };
        // SAFETY: NULL or an option object that only this thread uses, by the manual above.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        opts.open.log = log.map(|log| {
            let logger = move |level: LogLevel, text: &str| {
                // The pointer is only reached through `data`, which is taken in as a whole and lives as long as the closure.
                let data = &data;
                let text = CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
                // SAFETY: the caller's function with its own pointer, and a C string.
                unsafe { log(data.user, level as u32, text.as_ptr()) }
            };
            Arc::new(logger) as Logger
        });
        Ok(())
    })
}

/// Told how far a long call has come.
///
/// user:  the pointer given with the function
/// done:  how much is done: bytes, or whatever the call counts in; never falls
/// total: how much there is in all; not 0
///
/// Returns 0 to go on; anything else makes the call end with -ECANCELED, leaving a valid image.
pub type qcow2_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, done: u64, total: u64) -> c_int>;

/// Lets the caller watch a long call (a create or a resize with preallocation, a check), and end it.
///
/// opts:     the options
/// progress: the function; NULL takes an earlier one away. Called during the call only, in its thread; it must not call
///           into the image
/// user:     passed to it
/// destroy:  called once with user when the options are freed or get another function; NULL if there is nothing to do.
///           Called too when this call fails
///
/// Returns 0 or -EINVAL. One thread at a time. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_opts_set_progress(
    opts: *mut qcow2_opts,
    progress: qcow2_progress_fn,
    user: *mut c_void,
    destroy: qcow2_destroy_fn,
) -> c_int {
    call(|| {
        let data = UserData { user, destroy };
        // SAFETY: NULL or an option object that only this thread uses, by the manual above.
        let opts = unsafe { opts.as_mut() }.ok_or_else(|| null("opts"))?;
        opts.progress = progress.map(|progress| Callback { progress, data });
        Ok(())
    })
}
