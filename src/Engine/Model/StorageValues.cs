using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Elements of a stored tensor in the run's storage type: the file's own memory when nothing
/// needs rounding, else a rounded copy.
/// </summary>
internal sealed unsafe class StorageValues : IDisposable
{
    private readonly void* _copy;

    public StorageValues(StoredTensor file, long begin, long count, DType storage)
    {
        void* source = (byte*)file.Data + (begin * file.Type.Size());
        Type = ModelWeights.StoredAs(file.Type, storage);
        Data = source;
        if (Type == file.Type) return;
        _copy = Data = NativeMemory.Alloc((nuint)(count * storage.Size()));
        var wide = storage == DType.F32
            ? (float*)_copy : (float*)NativeMemory.Alloc((nuint)count * 4);
        FloatBits.Widen(source, file.Type, wide, (nint)count);
        if (storage == DType.F32) return;
        FloatBits.Narrow(wide, _copy, storage, (nint)count);
        NativeMemory.Free(wide);
    }

    public DType Type { get; }

    public void* Data { get; }

    public void Dispose()
    {
        if (_copy is not null) NativeMemory.Free(_copy);
    }
}
