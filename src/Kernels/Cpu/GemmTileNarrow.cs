using System.Runtime.CompilerServices;

namespace MiniCpmNative.Kernels.Cpu;

internal static unsafe partial class GemmTile<T, V, I, R, L>
{
    /// <summary>
    /// C[R, Width] = alpha * A B + beta * C + bias; A steps by aStep per k and B by bStep,
    /// C is not read when beta is 0, bias may be null.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void One(
        nint k, T* a, nint aRow, nint aStep, T* b, nint bStep, in GemmOut<T> to)
    {
        V c0 = I.Zero;
        V c1 = I.Zero;
        V c2 = I.Zero;
        V c3 = I.Zero;
        V c4 = I.Zero;
        V c5 = I.Zero;
        V c6 = I.Zero;
        V c7 = I.Zero;
        V c8 = I.Zero;
        V c9 = I.Zero;
        V c10 = I.Zero;
        V c11 = I.Zero;
        T* c = to.C;
        nint stride = to.Stride;
        for (int i = 0; i < R.Count && k >= PrefetchDepth; i++)
        {
            I.Prefetch(c + (i * stride));
        }

        for (; k > 0; k--)
        {
            V b0 = I.Load(b);
            V x = I.Broadcast(L.At(a, aRow, 0));
            c0 = I.Fma(x, b0, c0);
            if (R.Count > 1)
            {
                x = I.Broadcast(L.At(a, aRow, 1));
                c1 = I.Fma(x, b0, c1);
            }

            if (R.Count > 2)
            {
                x = I.Broadcast(L.At(a, aRow, 2));
                c2 = I.Fma(x, b0, c2);
            }

            if (R.Count > 3)
            {
                x = I.Broadcast(L.At(a, aRow, 3));
                c3 = I.Fma(x, b0, c3);
            }

            if (R.Count > 4)
            {
                x = I.Broadcast(L.At(a, aRow, 4));
                c4 = I.Fma(x, b0, c4);
            }

            if (R.Count > 5)
            {
                x = I.Broadcast(L.At(a, aRow, 5));
                c5 = I.Fma(x, b0, c5);
            }

            if (R.Count > 6)
            {
                x = I.Broadcast(L.At(a, aRow, 6));
                c6 = I.Fma(x, b0, c6);
            }

            if (R.Count > 7)
            {
                x = I.Broadcast(L.At(a, aRow, 7));
                c7 = I.Fma(x, b0, c7);
            }

            if (R.Count > 8)
            {
                x = I.Broadcast(L.At(a, aRow, 8));
                c8 = I.Fma(x, b0, c8);
            }

            if (R.Count > 9)
            {
                x = I.Broadcast(L.At(a, aRow, 9));
                c9 = I.Fma(x, b0, c9);
            }

            if (R.Count > 10)
            {
                x = I.Broadcast(L.At(a, aRow, 10));
                c10 = I.Fma(x, b0, c10);
            }

            if (R.Count > 11)
            {
                x = I.Broadcast(L.At(a, aRow, 11));
                c11 = I.Fma(x, b0, c11);
            }

            a += aStep;
            b += bStep;
        }

        V alpha = I.Broadcast(to.Alpha), beta = I.Broadcast(to.Beta);
        bool read = to.Beta != T.Zero;
        V bias0 = to.Bias is null ? I.Zero : I.Load(to.Bias);
        Put(c, c0, alpha, beta, bias0, read);

        if (R.Count > 1)
        {
            c += stride;
            Put(c, c1, alpha, beta, bias0, read);
        }

        if (R.Count > 2)
        {
            c += stride;
            Put(c, c2, alpha, beta, bias0, read);
        }

        if (R.Count > 3)
        {
            c += stride;
            Put(c, c3, alpha, beta, bias0, read);
        }

        if (R.Count > 4)
        {
            c += stride;
            Put(c, c4, alpha, beta, bias0, read);
        }

        if (R.Count > 5)
        {
            c += stride;
            Put(c, c5, alpha, beta, bias0, read);
        }

        if (R.Count > 6)
        {
            c += stride;
            Put(c, c6, alpha, beta, bias0, read);
        }

        if (R.Count > 7)
        {
            c += stride;
            Put(c, c7, alpha, beta, bias0, read);
        }

        if (R.Count > 8)
        {
            c += stride;
            Put(c, c8, alpha, beta, bias0, read);
        }

        if (R.Count > 9)
        {
            c += stride;
            Put(c, c9, alpha, beta, bias0, read);
        }

        if (R.Count > 10)
        {
            c += stride;
            Put(c, c10, alpha, beta, bias0, read);
        }

        if (R.Count > 11)
        {
            c += stride;
            Put(c, c11, alpha, beta, bias0, read);
        }
    }
}
