namespace MiniCpmNative.Engine.Model;

/// <summary>An object for each of the batches that are on the device together.</summary>
internal sealed class PerBatch<T>
    where T : class, new()
{
    private T[] _all = [new()];

    /// <summary>That of a batch; made when first asked for.</summary>
    public T this[int number]
    {
        get
        {
            int there = _all.Length;
            if (number >= there)
            {
                Array.Resize(ref _all, number + 1);
                for (int i = there; i <= number; i++) _all[i] = new();
            }

            return _all[number];
        }
    }
}
