using System.Collections.Concurrent;
using System.Runtime.InteropServices;

namespace MiniCpmNative.Engine.Data.Images;

/// <summary>A decoder library of the system, looked for when the first picture needs it.</summary>
internal sealed class NativePictureLibrary(string format, string name, string install,
    string[] files)
{
    private readonly ConcurrentDictionary<string, nint> _entries = new();
    private readonly Lazy<nint> _handle = new(() => Find(files));

    /// <summary>Lets a test run as where no library is; goes with it to the threads it
    /// starts.</summary>
    internal static AsyncLocal<bool> Hidden { get; } = new();

    public string Name => name;

    public string Install => install;

    public bool Found => !Hidden.Value && _handle.Value != 0;

    /// <summary>Why a picture cannot be read without the library, and what to do.</summary>
    public string Needed => $"needs {name}, and none was found; {install}; or convert the picture "
        + "to PNG";

    /// <summary>Whether pictures of the format can be read, and what to install if not.</summary>
    public string Describe() => Found
        ? $"{format}: {name} found"
        : $"{format}: {name} not found, so {format} pictures cannot be read; {install}";

    /// <summary>Address of an exported function.</summary>
    /// <exception cref="InputException">The library or the function is missing; says what to
    /// install.</exception>
    public nint Entry(string function, ByteSource source)
    {
        if (!Found) throw source.Error($"is a {format} picture, which {Needed}");
        if (_entries.TryGetValue(function, out nint known)) return known;
        if (!NativeLibrary.TryGetExport(_handle.Value, function, out nint address))
            throw source.Error(
                $"is a {format} picture, which needs {name}; the one found has no {function}");
        return _entries[function] = address;
    }

    /// <summary>The first of the files that loads; 0 when none does.</summary>
    public static nint Find(string[] files)
    {
        foreach (string file in files)
            if (NativeLibrary.TryLoad(file, out nint handle)) return handle;
        return 0;
    }
}
