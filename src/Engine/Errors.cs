namespace MiniCpmNative.Engine;

/// <summary>
/// What the user gave cannot be used: a configuration, an argument, a model, adapter, data or
/// picture file. The message is one line that says what, where, expected, got and what to do;
/// exit code 2.
/// </summary>
public sealed class InputException(string message, Exception? inner = null)
    : Exception(message, inner);

/// <summary>
/// A run failed although its input was right (disk full, loss not finite ...); exit code 1.
/// </summary>
public sealed class RunException(string message, Exception? inner = null)
    : Exception(message, inner);
