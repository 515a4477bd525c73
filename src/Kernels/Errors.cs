namespace MiniCpmNative.Kernels;

/// <summary>
/// An operation was given tensors it cannot take; names op, argument, expected and got.
/// </summary>
public sealed class ShapeException(string message) : Exception(message);

/// <summary>A tensor was read after the scope that owned its memory had ended.</summary>
public sealed class StaleTensorException(string message) : Exception(message);

/// <summary>Memory ran out; names the largest tensors and the setting that would help.</summary>
public sealed class DeviceMemoryException(string message) : Exception(message);
